"""What crosses a process boundary, defined once: messages, subjects, headers, errors, and the OpenAI chat surface."""
