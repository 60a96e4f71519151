"""The command llama-parity: test a Llama, compare, convert, and copy the golden vectors."""
