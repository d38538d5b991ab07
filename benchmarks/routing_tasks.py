"""The tasks of the routing benchmark, by the tier each was written for.

Nobody's requests and no data set's: made up for this, without looking at what the router says of
them, and not changed when it errs. Those for *minimal* need neither tools nor background; those for
*standard* one or two tools; those for *full* what stands in that tier alone: rules for long,
delicate or unattended work, or what was said and settled before. Each begins with another word, so
that a slot that has answered one holds nothing of the next but the tier.
"""

from __future__ import annotations

from keepwarm.router import TIERS

MINIMAL = (
    "What is the capital of Mongolia?",
    "Translate 'good morning, neighbour' into Spanish.",
    "Rewrite this more politely: send me the invoice today.",
    "Give me three synonyms for 'stubborn'.",
    "How many minutes are there in a day and a half?",
    "Is a whale a fish or a mammal?",
    "Spell the plural of 'octopus'.",
    "Name four gases in the air we breathe.",
    "Explain photosynthesis to a child in two sentences.",
    "Which is heavier, a litre of water or a litre of oil?",
    "Compose a haiku about a rainy bus stop.",
    "Correct the grammar: him and me was late to the concert.",
    "Suggest a title for a short story about a lighthouse keeper.",
    "Who wrote the play about the prince of Denmark?",
    "Thanks, that was all. Good night!",
    "Convert 68 degrees Fahrenheit to Celsius.",
    "Why does ice float on water?",
    "Sum up in one line what inflation means.",
    "Does the word 'accommodate' have one m or two?",
    "Say something funny about penguins.",
    "If a train covers 180 km in two hours, how fast does it go on average?",
    "Define 'serendipity' in plain English.",
    "Order these by size: Jupiter, Mars, Earth, Mercury.",
    "Was heißt 'Löffel' auf Englisch?",
)

STANDARD = (
    "Read notes/shopping.txt and tell me what is still missing.",
    "Search the web for the opening hours of the town library.",
    "Run the unit tests in this folder and report which ones fail.",
    "List the files in Downloads that are larger than 100 MB.",
    "Replace 'teh' by 'the' in draft.md.",
    "Remind me at six in the evening to take the bread out of the oven.",
    "Look up today's exchange rate from euros to Swiss francs.",
    "Please check what time it is in Tokyo right now.",
    "Create a file todo.md with three empty checkboxes.",
    "Find every Python file that imports sqlite3.",
    "Check how much space is left on the disk.",
    "Remember that my dentist's appointment was moved to Thursday.",
    "Fetch https://example.org/changelog and tell me what changed in the last version.",
    "Append the line 'paid 14 March' to invoices.csv.",
    "Count the lines of all Markdown files under docs.",
    "Move report_final2.odt into the archive folder.",
    "Schedule a backup of the Photos folder for every Sunday at three in the morning.",
    "Install ripgrep and tell me its version.",
    "Show the last 20 lines of server.log.",
    "Compare config.old.toml with config.toml and say which keys are new.",
    "Did it rain in Bergen yesterday?",
    "See which process is listening on port 8080.",
    "Sort the lines of names.txt and save the result as names-sorted.txt.",
    "Suche im Projekt nach allen Stellen, an denen die Mailadresse steht.",
)

FULL = (
    "Rename the setting `colour` to `color` in the whole project, data files and documentation "
    "included, without breaking what is stored already.",
    "Last week we agreed on a layout for the newsletter. Apply it to this month's texts.",
    "Overnight, go through the 400 scanned letters, name each file by sender and date, and leave "
    "me a report for the morning.",
    "Migrate the blog to plain Markdown: plan it first, do one post from end to end, then the "
    "other ninety.",
    "Where did we stop with the tax papers, and what is the next step?",
    "Reorganise my photo archive by year; delete nothing, keep a list of every move, and make it "
    "possible to undo all of it.",
    "Draft answers in my name to the landlord's three open mails, as I like them written, and "
    "don't send anything.",
    "The nightly backup has failed three times. Work out why, compare with the last run that "
    "worked, mend it, and prove that it holds.",
    "Every Monday, collect new papers on soil carbon, leave out those already reported, and write "
    "me a summary with sources.",
    "Continue the refactoring you began yesterday; the plan file says what is left.",
    "Upgrade the server to the next Debian release step by step, with a way back at every step, "
    "and stop if anything looks odd.",
    "As I told you about Anna's birthday, prepare everything: guests, the cake, and presents.",
    "Audit our repository for secrets that were committed by mistake, say what has to be changed, "
    "and repeat none of them.",
    "Merge the two address books: list conflicts for me, and let no private note get into the "
    "shared copy.",
    "My usual rules for invoices apply: check the twelve PDFs in Inbox and book those that fit.",
    "Before you touch the production database, write down how the column will be split, try it on "
    "a copy, and show me the difference.",
    "Write the quarterly report the way we did it in spring, with the figures of the attached "
    "spreadsheets.",
    "Investigate why the pages have become slower since March: measure, rule out one cause after "
    "another, and document what you find.",
    "Following the style we settled on, edit all eleven chapters of the manuscript and log every "
    "change that alters the meaning.",
    "You know how I want trips planned: a week in Porto in May, with sources, prices and "
    "alternatives, and mark what I must decide.",
    "Clean up the home directory while I'm away; nobody can answer questions, so choose only what "
    "can be undone and collect the rest.",
    "Use what you remember of my diet to plan two weeks of meals, check the pantry file, and "
    "schedule the shopping.",
    "Test whether the restored backup is complete: sample every folder, compare checksums, account "
    "for each difference, and tell me how sure you are.",
    "Two suppliers sent contracts. Compare them clause by clause with what we decided in June, and "
    "flag everything that speaks against it.",
)

TASKS = dict(zip(TIERS, (MINIMAL, STANDARD, FULL), strict=True))
