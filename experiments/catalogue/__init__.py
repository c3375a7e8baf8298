"""What the papers of the attacks claim, repeated on real data, and curves of black-box attacks against queries."""
