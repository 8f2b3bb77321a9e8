"""What policies learnt, kept from one run to the next: only for those who ask for it (``remember``)."""
