"""Distillation by `Trainer`: what a student learns from its teacher, who judges it, and when that ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .calibration.batches import Calibration
from .calibration.distance import mean_loss, predictor
from .calibration.knowledge import Knowledge
from .calibration.outputs import outputs_for
from .errors import CalibrationError
from .history import Recovery
from .state import Pruner, tell
from .structure.facts import in_eval_mode, same_modes, to_model
from .structure.hooks import carried
from .structure.sublayers import Sublayer, find_sublayers


LOOKS = 8
"""How many times a model is judged on them at most."""

WARM_UP = 20
"""Steps in which the learning rate rises to its value. It falls from there to 0 at the end of the time."""

LOST = 2.0
"""A student that is so many times as far away as at first does not come back as the learning rate falls."""

STEP_BACK = 1 / 3
"""What the learning rate is multiplied by when a look has found the student lost."""

COUNTED = "counted"
"""Name, beside the inputs of a batch, of the tokens that count."""


@dataclass
class Lesson:
    """What a student learns, and how far it is from that.

    Args:
        calibration: The rows.
        loss: The distance of outputs.
        student: In float32. The layers of its stacks are trained; embeddings and heads stay.
        teacher: The dense model.
    """

    calibration: Calibration
    loss: Knowledge
    student: PreTrainedModel
    teacher: PreTrainedModel

    def distance(self) -> float:
        """The mean distance of the outputs on the rows that are held out."""
        with in_eval_mode(self.student), in_eval_mode(self.teacher):
            student, expected = (predictor(model, self.loss) for model in (self.student, self.teacher))
            return mean_loss(self.calibration, self.student, student, expected, self.loss)

    @contextmanager
    def flags(self) -> Iterator[None]:
        """Within this context the layers of the student have gradients, and nothing else has."""
        layers = {id(s.layers): s.layers for s in find_sublayers(self.student)}.values()
        trained = {id(p) for stack in layers for p in stack.parameters()}
        before = [(p, p.requires_grad) for p in self.student.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained)
        with same_modes(self.teacher):
            self.teacher.eval()
            yield
        for parameter, flag in before:
            parameter.requires_grad_(flag)


class Watch(TrainerCallback):
    """Judges the student from time to time, remembers it at its best, and ends the training when the time is
    up, never before: most is learnt at the end, when the learning rate falls. A student that is lost goes
    back to its best, and goes on with a lower learning rate.

    Args:
        pruner: Whose listeners are told how much is done.
        lesson: It has the student.
        recovery: Where the looks are written.
        end: When the time is up, by `time.monotonic`.
    """

    def __init__(self, pruner: Pruner, lesson: Lesson, recovery: Recovery, end: float):
        self.pruner, self.lesson, self.recovery = pruner, lesson, recovery
        self.begin, self.end, self.next = time.monotonic(), end, 1 / LOOKS
        self.factor = 1.0
        self.best = self.weights()

    def share(self, state: TrainerState, arguments: TrainingArguments) -> float:
        """The share of the training that is done, by its time or by its steps, whichever is more."""
        time_gone = (time.monotonic() - self.begin) / max(self.end - self.begin, 1e-9)
        steps_gone = state.global_step / arguments.max_steps if arguments.max_steps > 0 else 0.0
        return min(1.0, max(time_gone, steps_gone))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights that are trained."""
        trained = ((n, p) for n, p in self.lesson.student.named_parameters() if p.requires_grad)
        return {name: parameter.detach().clone() for name, parameter in trained}

    def look(self, step: int) -> bool:
        """Judge the student, remember it if it is better than before, and say whether it is lost."""
        try:
            distance = self.lesson.distance()
        except CalibrationError:  # the loss is not finite, as it was before the first step
            distance = math.inf
        self.recovery.looks.append([step, distance if math.isfinite(distance) else None])
        if distance < self.recovery.distance_after:
            self.recovery.distance_after, self.best = distance, self.weights()
        return distance > LOST * self.recovery.distance_before

    def go_back(self, optimizer: Optimizer) -> None:
        """Put the student back to its best, and lower the learning rate."""
        self.lesson.student.load_state_dict(self.best, strict=False)
        optimizer.state.clear()  # its averages are of the way that was wrong
        self.factor *= STEP_BACK

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        share = self.share(state, args)
        tell(self.pruner, "on_progress", share)
        if share >= self.next and share < 1:
            self.next = share + 1 / LOOKS
            if self.look(state.global_step):
                self.go_back(others["optimizer"])
        control.should_training_stop |= share >= 1


class Distillation(Trainer):
    """`Trainer` whose loss is how far a student is from its teacher, relative to how far it is at first.

    Args:
        lesson: Student, teacher, and the distance of their outputs.
        watch: It knows how much is done.
        arguments: Options.
        rows: Calibration rows.
    """

    def __init__(
        self, lesson: Lesson, watch: Watch, arguments: TrainingArguments, rows: list[dict[str, Any]]
    ):
        self.lesson, self.watch = lesson, watch
        self.scales: list[float] = []
        self.tops = [
            {s.stack_name: s for s in find_sublayers(model)} for model in (lesson.student, lesson.teacher)
        ]
        super().__init__(
            model=lesson.student,
            args=arguments,
            train_dataset=rows,
            data_collator=self.collate,
            callbacks=[watch],
        )

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Inputs of the model, and which tokens count, if some do not."""
        inputs, counted = self.lesson.calibration.collate(rows)
        return inputs if counted is None else {**inputs, COUNTED: counted}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:  # noqa: ARG002
        """A learning rate that rises at first and falls to 0 as the time runs out."""

        def rate(step: int) -> float:
            left = 1 - self.watch.share(self.state, self.args)
            return self.watch.factor * min(1.0, (step + 1) / WARM_UP) * left

        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, rate)
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The distances of the outputs and of what leaves the highest layers, as shares of the first ones."""
        lesson, counted = self.lesson, inputs.pop(COUNTED, None)
        batch = lesson.calibration.maker.batch(inputs, counted)
        with hidden_states(self.tops[0]) as ours, in_eval_mode(model):  # without dropout
            outputs = outputs_for(lesson.loss, model, [*self.tops[0].values()], batch)
        with torch.no_grad(), hidden_states(self.tops[1]) as theirs:
            same = replace(batch, inputs=to_model(batch.inputs, lesson.teacher))
            expected = outputs_for(lesson.loss, lesson.teacher, [*self.tops[1].values()], same)
        # a student whose loss is not finite is lost, as the next look finds
        parts = [lesson.loss(outputs, expected, batch.counted).mean()]
        for name, top in self.tops[0].items():
            if name in ours:
                student, teacher = (batch.by_token(states[name], name) for states in (ours, theirs))
                parts.append(relative_distance(student, teacher, batch.tokens(top, student)))
        self.scales = self.scales or [max(float(part.detach()), 1e-12) for part in parts]
        loss = sum(part / scale for part, scale in zip(parts, self.scales, strict=True))
        return (loss, outputs) if return_outputs else loss


@contextmanager
def hidden_states(tops: Mapping[str, Sublayer]) -> Iterator[dict[str, Tensor]]:
    """What leaves the highest layer of each stack in the forward passes of this context, by its name."""
    states: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for top in tops.values():

            def keep(_module: object, _inputs: object, output: Any, top: Sublayer = top) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                states[top.stack_name] = carried(top, hidden)

            stack.callback(top.layers[-1].register_forward_hook(keep).remove)
        yield states


def relative_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens (B, T) of the squared distance of states (B, T, D), relative to the
    teacher's squared length."""
    student, teacher = student.float(), teacher.float()
    distances = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    return distances[valid].mean()
