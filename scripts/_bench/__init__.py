"""The parts of scripts/bench: sizes and floors, the report, and one module per thing that is measured."""
