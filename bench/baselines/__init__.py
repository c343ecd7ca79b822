"""Who does the work beside fastsal: plain formulas and peers; and the networks that they are given."""
