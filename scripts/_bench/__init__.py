"""The parts of scripts/bench: sizes and floors, the report, and one module a thing that is measured."""
