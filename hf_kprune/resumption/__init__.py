"""Interrupted runs go on: what a run has measured, decided and tuned is kept on the disk, and the same run,
begun again, takes it from there.

    FOLDER/measured-<digest>.safetensors      what was measured of the dense model, for any budget
    FOLDER/<run>/facts.safetensors            what the run is about: options, weights, rows, versions
    FOLDER/<run>/decided.safetensors          which units stay, of a method that decides beforehand
    FOLDER/<run>/sublayer-003.safetensors     its entry in the report when it is done, and its tuned weights
    FOLDER/<run>/finished.safetensors         that the model is there, and has only to be saved
    FOLDER/<run>/point.safetensors            of a sweep, how good a model is that is done

Every file is written once, beside its place, and put there in one step; all of them together are no larger
than the measurements and the tuned weights. What the batches have become is not kept: it follows from the
weights below, so a run that goes on carries the batches up again, by forward passes alone.
"""

from .record import Record
from .states import States, states_of


__all__ = ["Record", "States", "states_of"]
