"""An HTTP server that speaks OpenAI's API; nothing of it is imported unless it serves."""
