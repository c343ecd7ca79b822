"""What fastsal is compared with: plain formulas and peers; and the networks that they are given."""
