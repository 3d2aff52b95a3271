"""vLLM serves uneven language models by its Transformers backend, where it knows the heads of each layer.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins` of this package. The
import of the package makes the model narrow, as everywhere; what is left is that vLLM lays out its attention
and its cache by a config for each layer, which it asks its convertor of configs for.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from ..modeling_kprune import BlockPlan, Plan, plan_of


BACKEND = "TransformersForCausalLM"
"""What vLLM calls a language model that Transformers computes."""

Configs = list[tuple[Any, Any]] | None
"""The config of a model and that of its language model, for each layer; None if all layers are alike."""


def register() -> None:
    """Let vLLM ask for the heads of each layer of a pruned model. Calling it again changes nothing."""
    import vllm.config  # noqa: F401  # its modules import each other, and this is the way in
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    convertor: Any = ModelArchConfigConvertorBase
    ask = getattr(convertor, "get_per_layer_hf_configs", None)
    if ask is None:
        warnings.warn(
            "this version of vLLM has one number of heads for all layers, so it cannot load uneven "
            "checkpoints of hf_kprune, which vLLM 0.32 can; update it, or prune with uniform=True"
        )
    elif not hasattr(ask, "is_kprune"):
        convertor.get_per_layer_hf_configs = answer(ask)


def answer(ask: Callable[[Any], Configs]) -> Callable[[Any], Configs]:
    @functools.wraps(ask)
    def per_layer(self: Any) -> Configs:
        plan = plan_of(self.hf_text_config)
        if plan is None:
            return ask(self)
        layers = layer_configs(self.hf_text_config, plan)
        if any(name.endswith("ForCausalLM") for name in self.hf_config.architectures or ()):
            self.hf_config.architectures = [BACKEND]  # as vLLM's own models have layers of one size
        one = self.hf_config is self.hf_text_config
        return [(config if one else self.hf_config, config) for config in layers]

    per_layer.is_kprune = True  # type: ignore[attr-defined]
    return per_layer


def layer_configs(config: Any, plan: Plan) -> list[Any]:
    """A config for each layer of a pruned language model, with the heads that it has.

    Raises:
        UnsupportedModelError: If vLLM cannot serve the model.
    """
    blocks = {block["kind"]: block for stack in plan["stacks"] for block in stack["blocks"]}
    reason = ""
    if len(plan["stacks"]) > 1 or not blocks.keys() <= {"attention", "ffn"}:
        reason = "more was pruned than the attentions and FFNs of one list of layers"
    elif any(not kept for block in blocks.values() for kept in block["kept"]):
        reason = "there are layers without heads or without neurons, expected min_heads=1 and min_neurons=1"
    elif "attention" in blocks and blocks["attention"].get("by") == "query":
        reason = "keys and values have unequally many queries, expected head_unit='group'"
    if reason:
        raise UnsupportedModelError(
            f"vLLM cannot serve this pruned model: {reason}; prune it so, or with uniform=True"
        )
    return [of_layer(config, blocks.get("attention"), i) for i in range(config.num_hidden_layers)]


def of_layer(config: Any, attention: BlockPlan | None, layer: int) -> Any:
    """The config of one layer."""
    config = copy.copy(config)
    if attention is not None:
        groups = attention["kept"][layer] or 0
        config.num_attention_heads = groups * attention["heads"]
        config.num_key_value_heads = groups
    return config
