"""``python -m llama_parity``: the command llama-parity."""

from .command.main import main

raise SystemExit(main())
