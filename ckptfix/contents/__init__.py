"""What a tree holds: tensors behind wrappers, whole models, state dicts, and what each key names.

Uses `tree` and `pickles`; knows no container.
"""
