"""The HTTP server: OpenAI's API over `jllama.Engine`. Needs the extra ``serve``; only `jllama.cli.serve` imports it."""
