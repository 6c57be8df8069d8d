"""Files on disk: text that people write, owners, temporary names, the cache folder. Interprets no format."""
