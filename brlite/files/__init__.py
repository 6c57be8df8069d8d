"""Files on disk: text that people write, owners, temporary names, new files, the cache folder. Interprets no format."""
