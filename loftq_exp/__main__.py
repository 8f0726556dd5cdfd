from loftq_exp.cli import main

main()
