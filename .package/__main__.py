import smtpmock

raise SystemExit(smtpmock.main())
