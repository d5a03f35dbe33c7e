"""Conversations as tokens with exact masks: forms of rows, chat templates, spans of turns, packing."""
