"""Conversational speech: turns in a voice that the model takes from the conversation before them."""

from dsm_jax.csm.conversation import Recorded, Request, Segment
from dsm_jax.csm.dialogue import Conversation
from dsm_jax.csm.options import CsmOptions

__all__ = ["Conversation", "CsmOptions", "Recorded", "Request", "Segment"]
