"""What a user may write, what the operator answers, and what the trainer is told.

Imports pydantic and the standard library, nothing else: every other room of the project builds on this one.
"""
