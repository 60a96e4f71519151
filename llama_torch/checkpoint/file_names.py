"""Names of the files of a model directory and of a training checkpoint."""

MODEL_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"

STATE_FILE = "training_state.safetensors"  # of a training state in one file

METADATA_FILE = ".metadata"  # of shards, written last: a folder without it is no checkpoint

RUN_FILE = "run.json"  # a run's settings; see training/run_file.py

TOKENIZERS = ("tokenizer.json", "tokenizer.model")

GENERATION_FILE = "generation_config.json"

# What may stand beside the weights of a model directory, but for config.json.
AROUND = (
    *(*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", GENERATION_FILE),
)

META_FILES = "consolidated.[0-9][0-9].pth"  # Meta's own form; tools/convert.py reads it
