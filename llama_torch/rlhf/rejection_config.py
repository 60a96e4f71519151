"""The settings of rejection sampling."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from llama_common.errors import InputError, check, check_positive, check_text

from ..inference.config import Dtype, SamplingConfig, check_choice


@dataclass(frozen=True)
class RejectionConfig:
    """Draw several answers to each prompt, and keep the one that a reward model scores best.

    This is Llama 2's rejection sampling (section 3.2.3). Fine-tune on the answers that are kept.
    """

    command: ClassVar[str] = "python -m llama_torch.rejection"
    basic: ClassVar[str] = (
        "model reward safety_reward prompts samples temperature max_new_tokens out resume earlier "
        "rows template seed device dtype"
    )

    model: str
    """Directory of the model that answers."""
    reward: str
    """Directory of a reward model."""
    prompts: tuple[str, ...] = ()
    """Files of prompts (.jsonl, also .gz or .zst; .parquet), folders or globs. A record holds
    prompt, a text or messages, or messages; safety true is the paper's tag."""
    out: str = "runs/best"
    """Folder to make."""
    safety_reward: str = ""
    """Directory of a safety reward model, whose score counts where the prompt is tagged. It counts
    too where its sigmoid is below 0.15."""
    samples: int = 10
    """Answers to each prompt."""
    temperature: float = 1.2
    """Divisor of the logits. The paper's is 1.2 to 1.3 for 10 to 100 samples."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens whose probabilities sum to this; 1 = all."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 = all."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most. One that is cut there is not kept."""
    seed: int = 0
    """Seed of the samples; each prompt and sample has its own, made of this."""
    earlier: tuple[str, ...] = ()
    """Folders of earlier rounds, whose answers are scored anew: the best of all rounds is kept."""
    resume: bool = False
    """Continue in --out what was interrupted there, with the same flags."""
    rows: int = 32
    """Answers drawn at a time. More take more memory, and are quicker on a GPU."""
    template: str = ""
    """File of a Jinja chat template, or llama2 for Llama 2's [INST] form; empty = the model's own.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the models; auto = a GPU if there is one."""
    dtype: Dtype = "float32"
    """Precision of the weights in memory."""

    def __post_init__(self) -> None:
        for name in ("model", "reward", "out"):
            check_text(name, getattr(self, name))
        if not self.prompts:
            raise InputError("--prompts is missing: name the files of prompts")
        for name in ("samples", "rows"):
            check_positive(self, name)
            check(getattr(self, name) < 2**20, name, getattr(self, name), "must be below 2^20")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(
                "--temperature 0 draws the same answer each time; choose one above, or --samples 1"
            )
        check_choice("dtype", self.dtype, Dtype)
        self.sampling()

    def sampling(self, seed: int | None = None) -> SamplingConfig:
        """Return the settings of an answer; InputError for one out of range."""
        return SamplingConfig(
            self.max_new_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            seed=self.seed if seed is None else seed,
        )
