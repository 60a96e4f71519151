"""Turn text into batches of token ids."""
