"""Pure decisions: money, tokens, plan, circuit, streams, translators. No I/O, no clock, no dice."""
