"""Define the model shapes that the benchmarks know by name."""

from llama_torch.model.config import ModelConfig

SHAPES = {
    "default": ModelConfig(),
    "15m": ModelConfig(288, 6, 6, 6, 48, 768, 32000),
    "124m": ModelConfig(768, 12, 12, 12, 64, 2048, 50304, 1024, tie_embeddings=False),
    "135m": ModelConfig(576, 30, 9, 3, 64, 1536, 49152),
    "1.1b": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000, 2048, tie_embeddings=False),
    "7b": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096, tie_embeddings=False),
}
