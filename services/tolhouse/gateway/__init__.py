"""The gateway, which serves OpenAI's HTTP API in front of workers: text in, text out."""
