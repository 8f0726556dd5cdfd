from loftq_exp.commands.run import main

main()
