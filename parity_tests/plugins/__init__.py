"""The suite's pytest plug-ins: backends, examples, reports, threads and memory."""
