"""The parts of the train stage: its inputs, what it checks, how it starts the ranks, what a rank does and writes."""
