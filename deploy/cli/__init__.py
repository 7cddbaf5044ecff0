"""The `hotpath` command: `up` runs the whole thing on one machine, the rest looks at it and administers it.

main (entry) -> up (arguments, what to start) -> supervise (processes and their order) -> slot (one process, restarted)
              | app (typer: every other command) -> doctor, admin (keys, budget, ledger, trace), envfile, serve
beside: credentials (secrets.env), confs (server configurations, catalogue), runfile (run.json), logs, warden, procfile
"""
