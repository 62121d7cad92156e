"""ReDrafter: an Elman recurrence over the drafted tokens beside the last hidden state, shared by all depths."""

from heads.redrafter.head import ReDrafterHead

HEAD = ReDrafterHead
