from hotloop.bench.cli import main

raise SystemExit(main())
