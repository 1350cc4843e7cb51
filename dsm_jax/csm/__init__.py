"""Conversational speech: turns in a voice that the model takes from the conversation before them."""

from dsm_jax.csm.conversation import Conversation
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.requests import Request, Segment

__all__ = ["Conversation", "CsmOptions", "Request", "Segment"]
