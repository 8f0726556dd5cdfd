"""Extensions of transformers and PEFT: the packed linear layer and its quantizer.

Imports storage, loftq, errors.
"""
