"""A checkpoint's generation_config.json: what it may say, and the tokens that end a text.

Its keys are those of transformers' 4.57 and 5.23 GenerationConfig.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_common.notes import note

from ..checkpoint.file_names import GENERATION_FILE
from ..tokenizer.tokenizer import Tokenizer

# Settings of SamplingConfig, whose flags decide whatever the file says.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Keys that would change the tokens, with the values beside null that do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("constraints", "force_words_ids", "stop_strings"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "dola_layers", "top_h"), ()),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ([], {}),
    "token_healing": (False,),
    "watermarking_config": (),
}
# Keys that say how much is generated, how fast, or what is returned beside the tokens.
INERT = (
    "_commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit "
    "assistant_ensemble_weight assistant_lookbehind bos_token_id cache_config "
    "cache_implementation compile_config continuous_batching_config decoder_start_token_id "
    "disable_compile early_stopping eos_token_id is_assistant length_penalty low_memory "
    "max_cache_len max_length max_matching_ngram_size max_new_tokens max_time "
    "num_assistant_tokens num_assistant_tokens_schedule output_attentions output_hidden_states "
    "output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens "
    "remove_invalid_values renormalize_logits return_dict_in_generate return_legacy_cache "
    "speculation_type target_lookbehind transformers_version use_cache use_mtp"
)


def read_generation_file(folder: Path) -> dict[str, Any]:
    """Return the keys of a folder's generation_config.json that are not null; {} without one.

    Its sampling settings, which flags say here, and keys that are not known are noted. Raises
    InputError where it asks for other tokens.
    """
    path = folder / GENERATION_FILE
    given = {k: v for k, v in read_json(path).items() if v is not None} if path.is_file() else {}
    asked = [f"{k}={v!r}" for k, v in given.items() if k in NEUTRAL and v not in NEUTRAL[k]]
    if asked:
        raise InputError(
            f"{path}: {', '.join(asked)[:200]} is not supported; remove it to generate without"
        )
    sampling = [f"{key}={given[key]!r}" for key in SAMPLING if key in given]
    if sampling:
        note(f"{path}: {', '.join(sampling)} is not taken from there; sampling is set by flags")
    unknown = sorted(given.keys() - {*SAMPLING, *NEUTRAL, *INERT.split()})
    if unknown:
        note(f"{path}: {', '.join(unknown)[:200]} is not known and not followed")
    return given


def end_ids(ckpt: Path, tokenizer: Tokenizer, vocab_size: int) -> set[int]:
    """Return the ids that end a text: those of generation_config.json and config.json, and EOS.

    A text ends at any of them. A line on stderr says so where the first of these files that names
    an end token leaves out one that a later file names.
    Raises InputError for ids beyond the vocabulary, and as ``read_generation_file``.
    """
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    config = folder / "config.json"
    files = {GENERATION_FILE: read_generation_file(folder)}
    files[config.name] = read_json(config) if config.is_file() else {}
    named: dict[str, set[int]] = {}
    for name, content in files.items():
        given = content.get("eos_token_id")
        if given is None:
            continue
        ids = given if isinstance(given, list) else [given]
        for id_ in ids:
            if type(id_) is not int or not 0 <= id_ < vocab_size:
                raise InputError(
                    f"{folder / name}: eos_token_id {id_!r} is no token of the vocabulary of "
                    f"{vocab_size}; correct it"
                )
        named[name] = set(ids)
    if tokenizer.eos is not None:
        named["tokenizer"] = {tokenizer.special[tokenizer.eos]}
    first = next(iter(named.values()), set())
    if any(ids - first for ids in named.values()):
        sets = "; ".join(f"{name} {sorted(ids)}" for name, ids in named.items())
        note(f"{folder}: end tokens differ ({sets}); a text ends at any of them")
    return set().union(*named.values())
