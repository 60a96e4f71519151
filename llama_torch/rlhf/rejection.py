"""Rejection sampling (section 3.2.3): of several answers to a prompt keep the best.

"We sample K outputs from the model and select the best candidate with our reward": over the rounds
before as well, whose answers are scored anew by the reward models of now.
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from llama_common.errors import InputError, printable, quoted
from llama_common.notes import note

from ..checkpoint.hf import load_model, require_finite
from ..checkpoint.weight_files import model_digest
from ..common.device import pick_device
from ..inference.generation_file import end_ids
from ..model.llama import Llama
from ..tokenizer.answers import answer_segments
from ..tokenizer.chat_template import ChatTemplate, load_jinja
from ..tokenizer.loading import load_tokenizer
from ..training.conversation_loading import DAY
from .answers import Answer, draw_answers, require_ends, sample_seed
from .prompts import FLAG, Prompt, TokenisedPrompt, load_prompts, prompt_ids, tokenise
from .rejection_config import RejectionConfig
from .rejection_folder import (
    CONVERSATIONS,
    PART,
    SAMPLES,
    Sample,
    Sampled,
    begin,
    conversation_line,
    key_of,
    locked,
    read_part,
    read_samples,
    write_lines,
)
from .rejection_table import table
from .scoring import Scorer, load_scorer, score_answers

SCORED_AT_ONCE = 64  # answers, at least, that wait for their scores
PROGRESS_SECONDS = 10
NOT_KEPT = ("out", "resume", "rows", "device")  # settings that do not change what is drawn


class Judged(NamedTuple):
    """The models of a round, and the prompts that it draws answers to."""

    model: Llama
    ends: set[int]
    template: ChatTemplate
    helpful: Scorer
    safe: Scorer | None
    prompts: list[TokenisedPrompt]
    n_left_out: int  # prompts too long for the context with an answer


class Kept(NamedTuple):
    """The best answer to a prompt."""

    prompt: Prompt
    answer: str
    is_earlier: bool  # it is of a round before


def run(config: RejectionConfig) -> list[str]:
    """Run a round; return the lines to print: what was drawn, the table, what to do next.

    Raises InputError for whatever it is given that cannot be used, before it makes --out, and where
    no answer can be kept.
    """
    out = Path(config.out)
    earlier = [one for name in config.earlier for one in read_samples(Path(name), "--earlier")]
    judged = _load(config)
    earlier = _scored_anew(judged, earlier)
    begin(out, _settings(config, judged.prompts), config.resume)
    with locked(out):
        done = {key_of(one.prompt.messages): one for one in read_part(out)}
        if not (out / SAMPLES).is_file():
            try:
                _draw_missing(config, judged, out, done)
            except KeyboardInterrupt:
                told = f"{len(done):,} of {len(judged.prompts):,} prompts are in {out}"
                print(f"{printable(told)}; --resume draws the others", file=sys.stderr)
                raise
            order = dict.fromkeys(key_of(one.prompt.messages) for one in judged.prompts)
            write_lines(out / SAMPLES, (done[key].line() for key in order))
            (out / PART).unlink(missing_ok=True)
        drawn = [*done.values()]
        kept, n_without = best(judged.template, drawn, earlier)
        if not kept:
            raise InputError(
                f"--max-new-tokens {config.max_new_tokens}: of {n_without:,} prompts none has an "
                f"answer that ends and can be learnt ({out / SAMPLES} has what was drawn); ask for "
                "more, in another --out"
            )
        lines = (conversation_line(one.prompt.messages, one.answer) for one in kept)
        write_lines(out / CONVERSATIONS, lines)
    return _report(config, judged, drawn, kept, n_without)


def _load(config: RejectionConfig) -> Judged:
    given = load_prompts(config.prompts)
    directory, device, dtype = Path(config.model), pick_device(config.device), config.dtype
    placed = {"dtype": getattr(torch, dtype), "device": device}
    model = load_model(directory, **placed)
    require_finite(model, f"--model {directory}")
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    ends = end_ids(directory, tokenizer, model.config.vocab_size)
    require_ends(ends, f"--model {directory}")
    template = load_jinja(directory, tokenizer, config.template, DAY)
    prompts = tokenise(given, template, model.config.max_seq_len, config.max_new_tokens)
    helpful = load_scorer(config.reward, template, **placed)
    safe = None
    if config.safety_reward:
        safe = load_scorer(config.safety_reward, template, "--safety-reward", **placed)
    for scorer in filter(None, (helpful, safe)):
        scorer.require_room(prompts, config.max_new_tokens)
    distinct = {key_of(prompt.prompt.messages): prompt for prompt in prompts}
    if len(distinct) < len(prompts):
        note(f"{FLAG}: {len(prompts) - len(distinct):,} prompts are there twice, and answered once")
    left_out = len(given) - len(prompts)
    return Judged(model, ends, template, helpful, safe, [*distinct.values()], left_out)


def _settings(config: RejectionConfig, prompts: Sequence[TokenisedPrompt]) -> dict[str, object]:
    """Return what a resumed round must share: the flags, and hashes of prompts and models."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.ids} {prompt.prompt.is_tagged}\n".encode())
    flags = {k: v for k, v in vars(config).items() if k not in (*NOT_KEPT, "earlier")}
    for name in ("model", "reward", "safety_reward"):
        if flags[name]:
            path = Path(flags[name]).resolve()
            flags[name] = f"{path} (sha256 {model_digest(path)[:16]})"
    return flags | {"prompts": digest.hexdigest()[:32]}


def _draw_missing(
    config: RejectionConfig, judged: Judged, out: Path, done: dict[str, Sampled]
) -> None:
    """Draw the answers that are not there yet, and append each prompt's as soon as it has all."""
    missing = [
        (number, prompt)
        for number, prompt in enumerate(judged.prompts)
        if key_of(prompt.prompt.messages) not in done
    ]
    begun, told = time.monotonic(), time.monotonic()
    n_before = len(done)
    with (out / PART).open("a", encoding="utf-8") as file:
        for sampled in _sampled(config, judged, missing):
            file.write(sampled.line())
            file.flush()
            done[key_of(sampled.prompt.messages)] = sampled
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                rate = (len(done) - n_before) * config.samples / (told - begun)
                n = len(judged.prompts)
                print(f"{len(done):,} of {n:,} prompts, {rate:.1f} answers/s", flush=True)


def _sampled(
    config: RejectionConfig, judged: Judged, prompts: Sequence[tuple[int, TokenisedPrompt]]
) -> Iterator[Sampled]:
    """Yield numbered prompts with all their answers, scored, in the order in which they end.

    Only the number of a prompt and of a sample decides on a sample's seed.
    """
    k = config.samples
    seeds = [sample_seed(config.seed, number, i) for number, _ in prompts for i in range(k)]
    settings = [replace(config.sampling(), seed=seed) for seed in seeds]
    ids = [prompt.ids for _, prompt in prompts for _ in range(k)]
    answers: dict[int, dict[int, Answer]] = {}
    waiting: list[tuple[TokenisedPrompt, list[Answer]]] = []
    for answer in draw_answers(judged.model, ids, settings, judged.ends, config.rows):
        place, sample = divmod(answer.prompt, k)
        own = answers.setdefault(place, {})
        own[sample] = answer
        if len(own) == k:
            waiting.append((prompts[place][1], [own[i] for i in range(k)]))
            del answers[place]
        if len(waiting) * k >= SCORED_AT_ONCE:
            yield from _scored(judged, waiting)
            waiting.clear()
    yield from _scored(judged, waiting)


def _scored(
    judged: Judged, given: Sequence[tuple[TokenisedPrompt, Sequence[Answer]]]
) -> Iterator[Sampled]:
    """Yield prompts with their answers and the scores of these."""
    prompts = [prompt for prompt, answers in given for _ in answers]
    answers = [answer for _, own in given for answer in own]
    scores = score_answers(prompts, answers, judged.helpful, judged.safe)
    safe: list[float | None] = (
        [None] * len(answers) if scores.safe is None else scores.safe.tolist()
    )
    columns = zip(answers, scores.rewards.tolist(), scores.helpful.tolist(), safe, strict=True)
    decode = judged.template.tokenizer.decode
    samples = (Sample(decode(a.ids), a.is_ended, tuple(a.ids), *rest) for a, *rest in columns)
    for prompt, own in given:
        yield Sampled(prompt.prompt, [next(samples) for _ in own])


def _scored_anew(judged: Judged, earlier: Sequence[Sampled]) -> list[Sampled]:
    """Return earlier rounds with the scores of the reward models of now."""
    given, decode = [], judged.template.tokenizer.decode
    for prompt, samples in earlier:
        if any(decode(sample.ids) != sample.answer for sample in samples):
            raise InputError(
                f"--earlier {prompt.place}: an answer was drawn with another tokenizer; leave out "
                "this round"
            )
        ids = prompt_ids(prompt, judged.template)
        answers = [Answer(0, list(one.ids), [], one.ended) for one in samples]
        given.append((TokenisedPrompt(prompt, ids), answers))
    return list(_scored(judged, given)) if given else []


def best(
    template: ChatTemplate, drawn: Sequence[Sampled], earlier: Sequence[Sampled] = ()
) -> tuple[list[Kept], int]:
    """Return the best answer to each prompt of all rounds, and the number of prompts without one.

    Fine-tuning must be able to learn it: one that was cut would teach to end there, one that is
    empty or that the template does not write is refused there. Of equal ones the first counts.
    """
    candidates: dict[str, list[tuple[Sample, bool, Prompt]]] = {}
    for is_earlier, rounds in ((False, drawn), (True, earlier)):
        for prompt, samples in rounds:
            own = candidates.setdefault(key_of(prompt.messages), [])
            own += [(sample, is_earlier, prompt) for sample in samples if sample.ended]
    kept = []
    for own in candidates.values():
        own.sort(key=lambda candidate: -candidate[0].reward)
        texts = ((learnable_text(template, one[2], one[0]), *one[1:]) for one in own)
        if found := next((one for one in texts if one[0]), None):
            text, is_earlier, prompt = found
            kept.append(Kept(prompt, text or "", is_earlier))
    return kept, len(candidates) - len(kept)


def learnable_text(template: ChatTemplate, prompt: Prompt, sample: Sample) -> str | None:
    """Return the text of an answer of which fine-tuning learns the tokens drawn; None if none.

    Without the white space around it, if the template puts that there. A text whose tokens would
    be others, as those of an odd spelling, is returned if there is no better.
    """
    stripped = sample.answer.strip()
    found = None
    for text in (stripped, sample.answer) if stripped else ():
        talk = [*prompt.messages, {"role": "assistant", "content": text}]
        try:
            learnt = [part.ids for part in answer_segments(template, talk) if part.learnt]
        except InputError:
            continue
        if learnt[-1] == list(sample.ids):
            return text
        found = found or text
    return found


def _report(
    config: RejectionConfig,
    judged: Judged,
    drawn: Sequence[Sampled],
    kept: Sequence[Kept],
    n_without: int,
) -> list[str]:
    n_cut = sum(not sample.ended for one in drawn for sample in one.samples)
    n_earlier = sum(one.is_earlier for one in kept)
    lines = [
        f"{len(drawn):,} prompts, {config.samples:,} answers to each at temperature "
        f"{config.temperature:g}; {n_cut:,} of them cut after {config.max_new_tokens:,} tokens"
    ]
    if judged.n_left_out:
        lines.append(f"{judged.n_left_out:,} prompts left out, too long for the context")
    lines += table([[sample.reward for sample in one.samples] for one in drawn])
    best_kept = f"kept the best answer to {len(kept):,} prompts"
    best_kept += f", of which {n_earlier:,} are of earlier rounds" if config.earlier else ""
    best_kept += f"; {n_without:,} have none that ends and can be learnt" if n_without else ""
    path = printable(str(Path(config.out) / CONVERSATIONS))
    template = f" --template {quoted(config.template)}" if config.template else ""
    learn = f"--init-from {quoted(config.model)}{template} --data {quoted(path)}"
    return [*lines, f"{best_kept}: {path}", "next:", f"  python -m llama_torch.sft {learn}"]
