"""docs/supported_models.md: what tests have proved of each model type, and what of it can go and what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoo import make

from hf_kprune.modeling_kprune import has
from hf_kprune.structure.reach import parts_left_alone
from hf_kprune.structure.sublayers import Sublayer, find_sublayers
from hf_kprune.structure.units import LatentHead


COMMAND = (
    'pytest -m "slow or not slow" tests/test_zoo.py tests/test_generation.py tests/test_uniform.py --table'
)
HEAD = f"""# Supported models

Written by `{COMMAND}`; `type:variant` is another config of a type. *Experts*: their neurons are pruned. *Latent*: its heads are those
of multi-head latent attention. What stands under *never cut* lies in the layers and stays as it is, whatever the budget: routers of
a mixture of experts, mixers of hybrids (Mamba, linear attention, convolutions), and what the second table gives the reason of. The
report says what share of the model is prunable.
"""


def supported_models(cells: Mapping[str, Mapping[str, str]], refused: Mapping[str, str]) -> str:
    """The page.

    Args:
        cells: For each model of the zoo the marks of what was proved, by column.
        refused: For each model type that is refused, why.
    """
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    heads = ["model type", *columns, "experts", "latent", "never cut"]
    lines = [_row(heads), _row(["---", *[":---:"] * (len(columns) + 2), "---"])]
    stays: dict[str, dict[str, str]] = {}
    for name, row in sorted(cells.items()):
        model = make(name)
        sublayers = find_sublayers(model)
        marks = [row.get(column, "-") for column in columns]
        marks += ["yes" if any(s.unit.in_experts for s in sublayers) else "-"]
        marks += ["yes" if any(isinstance(s.unit, LatentHead) for s in sublayers) else "-"]
        lines.append(_row([name, *marks, never_cut(sublayers)]))
        reasons = {path.rpartition(".")[2]: why for path, why in parts_left_alone(model).items()}
        together = next((s.block.obstacle for s in sublayers if " " in s.block.obstacle), "")
        reasons |= {"single heads": together} if together else {}
        if reasons:
            stays[name.split(":")[0]] = reasons
    green = sum("**no**" not in row.values() for row in cells.values())
    types = len({name.split(":")[0] for name in cells})
    lines += ["", f"{green} of {len(cells)} green, {types} model types.", ""]
    lines += [_row(["model type", "stays", "because"]), _row(["---"] * 3)]
    lines += [_row([name, part, why]) for name, parts in stays.items() for part, why in parts.items()]
    lines += ["", _row(["refused", "because"]), _row(["---"] * 2)]
    lines += [_row([name, why]) for name, why in sorted(refused.items())]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def never_cut(sublayers: Sequence[Sublayer]) -> str:
    """What the layers of a model hold that its family leaves as it is."""
    paths = [path for s in sublayers for path in s.stack.untouched if has(s.layer, path)]
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "-"


def _row(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"
