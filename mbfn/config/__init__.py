"""Configuration as frozen values, and their composition from Hydra groups."""
