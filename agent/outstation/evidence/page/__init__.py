"""Page of an evidence folder (index.html): one static document for readers who are not engineers."""
