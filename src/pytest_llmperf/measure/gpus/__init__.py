"""The GPUs: what each vendor's tools tell, who may use which, and what an engine does with them."""
