"""Trains and tests networks: LightningModules, schedules, checkpoints, embeddings."""
