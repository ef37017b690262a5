"""Low-rank adapters on a base's layers: which, how peft makes them, and their files."""
