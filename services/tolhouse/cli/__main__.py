from tolhouse.cli import main

main()
