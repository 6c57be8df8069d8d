"""A file for each architecture: Hugging Face's config and weight names become ours."""
