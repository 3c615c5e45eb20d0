"""The gateway: OpenAI-compatible HTTP in front of workers. Text in, text out."""
