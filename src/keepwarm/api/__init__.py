"""A client's request, read: every API in chat's terms, as llama-server itself converts them."""
