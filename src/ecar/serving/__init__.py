"""Serving: one engine per device, the OpenAI Images API in front of it, and a web page."""
