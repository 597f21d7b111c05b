"""Conversations to compare two models on where there is no dataset: both should find them equally likely."""

from __future__ import annotations

from appliance.data.dataset import Row

_PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so blue reaches us from all sides."),
    ("Write a line of Python that prints the numbers from 1 to 5.", "print(*range(1, 6))"),
    ("What is 17 times 6?", "17 times 6 is 102, because 10 times 6 is 60 and 7 times 6 is 42."),
    ("Translate to German: The train is late.", "Der Zug hat Verspätung."),
    ("Wie spät ist es, wenn beide Zeiger auf der Zwölf stehen?", "Dann ist es Mittag oder Mitternacht."),
    ("¿Cuál es el río más largo de España?", "El Tajo es el río más largo de la península ibérica."),
    ("Quelle est la couleur d'un citron mûr ?", "Un citron mûr est jaune."),
    ("日本の首都はどこですか。", "日本の首都は東京です。"),
    ("Give the JSON of a point at x = 3 and y = -1.", '{"x": 3, "y": -1}'),
    ("Write an SQL query for the names of all customers in Oslo.", "SELECT name FROM customers WHERE city = 'Oslo';"),
    ("What does the shell command `ls -l | wc -l` do?", "It counts the lines that a long listing of the folder has."),
    ("Summarise in one sentence: Bees gather nectar and carry pollen.", "While bees feed, they also pollinate plants."),
    ("Is a whale a fish?", "No, a whale is a mammal: it breathes air and feeds its young with milk."),
    (
        "List two causes of the First World War.",
        "1. Rival alliances.\n2. The assassination in Sarajevo in 1914.",
    ),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around 1600."),
    ("How do I boil an egg?", "Put it into boiling water, wait eight minutes, then cool it under the tap."),
    (
        "Write a polite refusal of an invitation to dinner.",
        "Thank you for asking me; I am not free that evening.",
    ),
    ("What is the derivative of x squared?", "It is 2x."),
    ("Explain recursion to a child.", "To see what recursion is, open a box that holds a smaller box just like it."),
    ("Sort these numbers: 9, 2, 7.", "2, 7, 9"),
    ("What is the opposite of generous?", "The opposite of generous is stingy."),
    ("Say goodbye.", "Goodbye, and take care!"),
)

PLAIN: list[Row] = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in _PAIRS
]
