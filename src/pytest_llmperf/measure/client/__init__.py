"""The load client: everything between a prompt and a RequestRecord."""
