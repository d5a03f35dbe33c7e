"""`python -m mbfn.generate`: text from a trained model."""
