"""The router's word lists: function words, cues, verb classes and everyday concepts.

Lists that a person can read and correct. What is learned is one weight a list and not one a word:
that is what carries over to requests of another style. A phrase is matched on whole words, in
lower case.
"""

# ruff: noqa: RUF001  (other languages' letters look like English ones)

from __future__ import annotations

from typing import Final


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


def _phrases(listed: str) -> tuple[str, ...]:
    """Phrases between bars; a line's end is a blank."""
    return tuple(" ".join(phrase.split()) for phrase in listed.split("|"))


STOP_WORDS: Final = frozenset(
    _words(
        """
        a about above after again all also am an and any anything are aren't as at be been before
        being below both but by can can't could couldn't did didn't do does doesn't doing don't
        done each either else etc every few for from further get give given go goes going got had
        hadn't has hasn't have haven't having he he's hello help her here hers hey hi him his how
        how's i i'd i'll i'm i've if in into is isn't it it's its itself just kind kindly know
        less let let's like lot made make makes many may maybe me might more most much must my
        myself need needs no nor not now of off ok on once one only or other our ours out over own
        per please provide quite rather really s same see she should show so some something such
        sure t tell than thank thanks that that's the their them then there there's these they
        they're thing this those through to too under until up upon us use used using very via
        want wants was wasn't way we we'd we'll we're we've well were weren't what what's when
        when's where where's whether which while who who's whom whose why will with within without
        won't would you you'd you'll you're you've your yours yourself
        """
    )
)

#: Function words of other languages in Latin letters; those that English has too don't count.
FOREIGN_WORDS: Final = frozenset(
    _words(
        """
        apa att auf avec bir bu care ce che co com comment como con cuál cuándo cómo da dan dans
        das de del della dem den der des det di dove du dónde een ein eine el em en es est este
        für gli het hoe ich il ini ist için jag jak je jest kannst la las le les los mi mit na ne
        nel nicht nie nous não och og onde op os où para pentru peux por posso pour puedes qual
        quand quando quanto que quel quelle qui qué saya se się som sono sur tu uma un una und une
        untuk van var ve você von vous w wat wer wie yang zu är è și
        """
    )
)

#: Words of tool descriptions that say nothing of what the tool is about.
TOOL_STOP_WORDS: Final = frozenset(
    _words(
        """
        allow allows api based both certain check criteria data detail detailed details different
        enable enables endpoint false field fields function functions given id include included
        includes including info information input item json key multiple name number object
        optional options output parameter parameters particular perform performs provided provides
        related request required result results retrieval returned returns several single specific
        specified string support supports system tool true type types used user users uses utility
        value values various
        """
    )
)

#: How questions begin, and ...
ASKING_WORDS: Final = frozenset(
    _words(
        """
        what who whom whose which when where why how is are was were do does did can could will
        would should has have whats who's what's where's when's how's
        """
    )
)

#: ... how requests do that only sound like one.
POLITE_WORDS: Final = frozenset(
    _words(
        """
        can could would will please kindly i i'd i'm help hey hi hello
        """
    )
)

#: Names of projects that look like names of files.
PROJECTS: Final = frozenset(
    _words(
        """
        llama.cpp whisper.cpp node.js next.js vue.js react.js three.js d3.js express.js nuxt.js
        discord.js chart.js
        """
    )
)

#: What a verb asks for, in requests and in tools.
VERB_CLASSES: Final[dict[str, tuple[str, ...]]] = {
    "look-up": _words(
        """
        search find get fetch retrieve locate lookup look list query read view check show browse
        obtain access discover identify display track monitor see tell info information details
        finder
        """
    ),
    "compute": _words(
        """
        calculate compute calc calculator calculates convert conversion converter estimate
        evaluate solve solver determine predict prediction simulate measure count analyze analyse
        analysis compare sum multiply divide add derive
        """
    ),
    "make": _words(
        """
        create generate make draw build compose write design produce plot render add register
        insert generator
        """
    ),
    "change": _words(
        """
        update set modify edit change delete remove cancel move rename copy turn adjust configure
        enable disable start stop open close lock unlock play pause mark replace resize toggle
        """
    ),
    "transact": _words(
        """
        book buy order purchase pay send post schedule reserve submit transfer sell email message
        share invite call upload download subscribe rent
        """
    ),
}

#: What phrases give away of a request. Each list is one feature (see features.py).
CUES: Final[dict[str, tuple[str, ...]]] = {
    "now": _phrases(
        """
        today | tonight | tomorrow | now | currently | current | latest | live | recent |
        recently | right now | at the moment | this week | this weekend | this month | next week |
        next month | next weekend | upcoming | nowadays | up to date | real time | ongoing |
        forecast | nearby | near me | closest | nearest | open now | breaking | yesterday |
        available | availability | as of
        """
    ),
    "look-up": _phrases(
        """
        search | find | look up | lookup | fetch | retrieve | locate | look for | check | list |
        browse | google | find out | get me | get the | show me | display | pull up |
        can you get | track | query | scan | details of | details for | details about |
        information on | information about | update on | search for
        """
    ),
    "act": _phrases(
        """
        book | buy | order | purchase | send | schedule | reserve | cancel | delete | remove |
        rename | copy | upload | download | install | register | subscribe | pay | transfer |
        turn on | turn off | switch on | switch off | set up | set the | set an | start the |
        stop the | open the | close the | lock the | unlock | log in | login | log into |
        sign in | post a | post it | add to | put in | fill up | activate | deactivate |
        remind me to | set a reminder | set a timer | set an alarm | invite | deploy | restart |
        move the | navigate | play | pause | submit | notify | email | tweet | comment | run |
        execute | launch | save | enable | disable | update the | update my | create a new |
        make a reservation | order me | rent | sell | retweet
        """
    ),
    "compute": _phrases(
        """
        calculate | compute | convert | estimate | evaluate | determine | how much is | simulate |
        predict | factorial | derivative | integral | area of | volume of | probability | gcd |
        square root | sum of | average of | roots of | solve | analyze | analyse | measure
        """
    ),
    "tool-words": _phrases(
        """
        use the tool | use tools | use your tools | using the tool | with the tool |
        call the function | call the tool | call the api | search the web | search online |
        search the internet | look it up | look this up | look that up | on the web |
        on the internet | web search | using the function | run the command | run the script |
        run the tests | execute the | in the terminal | in the shell
        """
    ),
    "explain": _phrases(
        """
        explain | describe | why | how does | how do | how can | how is | how are |
        what is the difference | what are the differences | difference between | compare |
        discuss | define | overview | meaning of | what does | what do | elaborate | outline |
        pros and cons | advantages | what causes | significance | principles | concept |
        teach me | understand | interpret | effects of | impact of | role of | history of
        """
    ),
    "write": _phrases(
        """
        write | compose | draft | story | poem | essay | lyrics | song | rewrite | paraphrase |
        summarize | summarise | translate | proofread | blog | article | paragraph | haiku |
        joke | screenplay | dialogue | monologue | novel | slogan | headline | fanfic | roleplay |
        role play | pretend | imagine | act as | brainstorm | sentence | sentences | rephrase |
        tone | grammar | cover letter | title for | caption | captions | script of | rhyme |
        chapter | fictional | character | parody | essay on
        """
    ),
    "code": _phrases(
        """
        python | javascript | typescript | java | code | html | css | sql | regex | c++ | rust |
        golang | algorithm | class | def | import | bug | compile | compiler | function that |
        a function to | a function | implement | implementation | program | script that |
        bash script | shell script | python script | refactor | unit test | unit tests |
        stack trace | exception | docker | kubernetes | react | django | pandas | excel formula |
        formula in excel | vba | powershell | return type | boolean | const | void | printf |
        println | endpoint | framework | git
        """
    ),
    "advice": _phrases(
        """
        recommend | best way | should i | how can i | how do i | how can you | can i use |
        how could i | should we | tips | advice | suggest | ideas for | what would you |
        your opinion | do you think | good idea | how to | how should | best practices |
        recommendations | suggestions
        """
    ),
    "past-conversation": _phrases(
        """
        as we discussed | we discussed | we talked about | we spoke about | last time we |
        last time you | last time i asked | previous conversation | previous conversations |
        earlier conversation | past conversation | past conversations | last conversation |
        our last | our previous | our earlier | our discussion | our chat | our conversation |
        last session | previous session | where we left off | where i left off | pick up where |
        do you remember | remember when i | remember what i | i told you | i mentioned |
        did i tell you | did i mention | have i told you | have i mentioned | you told me |
        you recommended | you suggested | you mentioned | we decided | we agreed | as before |
        based on what you know about me | you know about me | what do you know about me |
        my earlier | my previous question | my last question | my last message | as i said |
        as you said | you said earlier | i said earlier | we worked on | remind me what |
        remind me when | remind me where | remind me who | remind me which | from our
        """
    ),
    "earlier": _phrases(
        """
        last time | continue | carry on | go on | like before | same as before | from before |
        i forgot | i forget | i misremember | i can't recall | i don't remember |
        i can't remember | i may be forgetting | the other day | what was my | what were my |
        what did i | when did i | where did i | who did i | why did i | how did i | which did i |
        what did we | when did we | have i | did i | my notes | meeting notes | my previous |
        my last | you said | remember
        """
    ),
    "self": _phrases(
        """
        my | mine | i | i'm | i've | i'd | me | our | ours | we | we've | we're
        """
    ),
    "self-question": _phrases(
        """
        did i | do i | was i | am i | have i | had i | were we | did we | do we | are we |
        i usually | is my | are my | was my | were my | does my | did my | do my | i should |
        i planned | i have to | i had to | i was | i use | i used | i hope | i host | i said |
        i own | i like | i'm supposed | i supposed | i currently | has my | had my | which of my |
        i prefer | i bought | i made | i met | i work | i live | i go | i went | i got | i plan |
        i believe | i start | i take
        """
    ),
    "own-files": _phrases(
        """
        attached file | attached document | the attached | attachment | my files | my file |
        my documents | my document | our files | our document | our documents | our readme |
        the readme | our codebase | my codebase | the codebase | this codebase | our repo |
        my repo | this repo | the repo | this repository | our repository | my repository |
        my workspace | the workspace | our wiki | our docs | our handbook | project files |
        file i uploaded | document i uploaded | i uploaded | i attached | my folder |
        uploaded file | uploaded document | current directory | working directory |
        in the file called | this directory | this folder | our notes
        """
    ),
    "how-to": _phrases(
        """
        how do i | how can i | how should i | how could i | how would i | how do you |
        how can we | how do we | should i | can i | could i | may i
        """
    ),
    "shared": _phrases(
        """
        the patient | the patient's | the meeting | the team meeting | the deadline |
        the project | the appointment | the plan | the team | the manager | the boss |
        the client | the clients | the customer | the reminder | the report | the interview |
        the trip | the party | the wedding | the presentation | the budget | the workshop |
        the conference call | the proposal | the contract | the invoice | the landlord |
        the doctor | the dentist | the vet | the supplier | the contractor | the internship |
        the startup | the group chat | the office | the sprint | the release | the ticket |
        the incident | the kids | the dog | the cat | the car | the gym | the recipe we |
        the one i | the ones i | the person i | the thing i | that i | they said | he said |
        she said | did they | did he | did she | was supposed to | were supposed to | were we |
        by thursday | by friday | on tuesday | on monday | on wednesday | on thursday |
        last month | last week | last year | last summer | last weekend | next month's
        """
    ),
    "files": _phrases(
        """
        file | files | folder | folders | directory | directories | repository | repo | attached |
        attachment | document | documents | spreadsheet | workspace | codebase | readme | pdf
        """
    ),
    "steps": _phrases(
        """
        first | second | then | next | after that | afterwards | finally | lastly | step by step |
        steps | once you | once that | and then | followed by | subsequently | after this | also |
        in addition | additionally | as well as | for each | respectively
        """
    ),
    "depth": _phrases(
        """
        prove | proof | derive | derivation | design | architecture | optimize | optimise |
        optimization | in depth | in detail | detailed | comprehensive | rigorous | theorem |
        lemma | complexity | efficient | strategy | trade offs | tradeoffs | critique |
        evaluate the | analyze the | step by step | thorough | constraints | requirements |
        research | proposal | plan for | scenario | assume | suppose | given that | justify |
        hypothesis | simulation | distributed | scalable | equation | matrix | eigenvalue |
        thesis | exactly | must | ensure
        """
    ),
    "story-problem": _phrases(
        """
        how many | how much | how old | how far | each | total | twice | half | times as |
        more than | less than | left | altogether | per | costs | cost | remaining | every |
        there are | he | she | they | his | her | their | has | had | gave | sold | bought
        """
    ),
    "small-talk": _phrases(
        """
        hi | hello | hey | thanks | thank you | good morning | good evening | good night |
        how are you | bye | goodbye | ok | okay | great | cool | nice | yes | no | sure | thx |
        cheers | what's up | who are you | lol | good afternoon | welcome | perfect | awesome |
        sorry | yep | nope | no thanks | see you | nice to meet you | what's your name |
        what is your name | how's it going | got it
        """
    ),
}

#: Cues in other languages, found as parts of the text: what English words would have shown.
FOREIGN_CUES: Final[dict[str, tuple[str, ...]]] = {
    "earlier": _phrases(
        """
        la última vez | como hablamos | como dijimos | te dije | te acuerdas | recuerdas |
        conversación anterior | la dernière fois | comme on a dit | comme discuté |
        tu te souviens | vous souvenez | notre conversation | letztes mal | wie besprochen |
        wie gesagt | erinnerst du dich | erinnern sie sich | letzten gespräch | mach weiter |
        l'ultima volta | come abbiamo detto | ti ricordi | ti ho detto | da última vez |
        como falamos | você lembra | lembra-se | в прошлый раз | как мы обсуждали | ты помнишь |
        помнишь | продолжи | напомни | 上次 | 之前 | 继续 | 还记得 | 我们讨论 | 前回 | この前 |
        続けて | 覚えて | さっき | 지난번 | 저번에 | 계속해 | 기억해 | 이전에 | geçen sefer |
        hatırlıyor musun | vorige keer | zoals besproken | ostatnim razem | المرة الماضية |
        هل تتذكر | पिछली बार | minule | förra gången
        """
    ),
    "small-talk": _phrases(
        """
        hola | gracias | bonjour | merci | salut | hallo | danke | guten tag | guten morgen |
        ciao | grazie | buongiorno | obrigado | obrigada | olá | bom dia | привет | спасибо |
        здравствуй | 你好 | 谢谢 | 您好 | こんにちは | ありがとう | 안녕 | 감사 | merhaba |
        teşekkür | مرحبا | شكرا | नमस्ते | धन्यवाद | dziękuję | cześć | ahoj | hej | tack
        """
    ),
    "now": _phrases(
        """
        hoy | ahora | mañana | aujourd'hui | maintenant | demain | heute | jetzt | morgen |
        aktuell | oggi | adesso | domani | hoje | agora | amanhã | сегодня | сейчас | завтра |
        今天 | 现在 | 明天 | 最新 | 今日 | 明日 | 오늘 | 지금 | 내일 | bugün | şimdi | yarın |
        vandaag | dzisiaj | dziś | اليوم | الآن | आज
        """
    ),
    "act": _phrases(
        """
        busca | buscar | encuentra | reserva | envía | compra | programa una | cherche | trouve |
        réserve | envoie | achète | suche | finde | buche | buchen | sende | schick | kaufe |
        cerca | trova | prenota | invia | procure | reserve | envie | найди | забронируй |
        отправь | купи | открой | закажи | 搜索 | 查询 | 查找 | 预订 | 发送 | 购买 | 打开 | 订 |
        检索 | 予約 | 検索 | 送って | 調べて | 예약 | 검색 | 보내 | 찾아 | ابحث | احجز | खोज
        """
    ),
    "files": _phrases(
        """
        archivo | carpeta | fichier | dossier | datei | ordner | cartella | arquivo | файл |
        папк | 文件 | ファイル | 파일 | dosya | bestand
        """
    ),
}

#: Words that name one everyday concept. Two texts that share no word can still share a concept.
CONCEPTS: Final[dict[str, tuple[str, ...]]] = {
    "weather": _words(
        """
        weather temperature humidity precipitation rain rainy snow forecast wind windy sunny storm
        climate cloudy umbrella celsius fahrenheit clima tiempo météo wetter 天气 погода 날씨 天気
        """
    ),
    "units": _words(
        """
        unit units convert conversion converter measurement kilogram gram pound ounce liter litre
        gallon cup teaspoon tablespoon meter metre kilometer mile foot feet inch yard celsius
        fahrenheit kelvin kg km lb lbs oz ml cm
        """
    ),
    "currency": _words(
        """
        currency currencies exchange dollar dollars euro euros usd eur gbp yen jpy pound yuan
        rupee peso convert conversion
        """
    ),
    "money": _words(
        """
        money price cost fee budget pay payment salary cash dollar euro usd eur gbp currency
        exchange bank account balance invoice precio prix preis 价格
        """
    ),
    "invest": _words(
        """
        stock stocks share invest investment portfolio dividend bond market ticker nasdaq trading
        crypto bitcoin equity shareholder acciones aktie 股票
        """
    ),
    "loan": _words(
        """
        loan mortgage interest principal debt credit repayment instalment compound
        """
    ),
    "tax": _words(
        """
        tax income deduction irs vat
        """
    ),
    "flight": _words(
        """
        flight flights airline airport plane fly airfare vuelo vol flug 航班 机票
        """
    ),
    "travel": _words(
        """
        travel trip hotel tour vacation itinerary booking accommodation visa passport resort
        airbnb hostel viaje voyage reise 酒店
        """
    ),
    "drive": _words(
        """
        car vehicle drive driving fuel gas gasoline tire engine mileage automobile parking
        """
    ),
    "ride": _words(
        """
        taxi cab uber lyft ride rideshare fare
        """
    ),
    "route": _words(
        """
        route directions distance map navigate navigation mile kilometer road traffic train bus
        subway commute miles km
        """
    ),
    "food": _words(
        """
        restaurant food eat meal dinner lunch breakfast cuisine menu dish pizza burger sushi cafe
        coffee dining comida essen
        """
    ),
    "cook": _words(
        """
        recipe cook cooking bake ingredient calorie nutrition nutrient diet vegan protein kitchen
        receta recette rezept
        """
    ),
    "shop": _words(
        """
        shop store shopping product cart grocery groceries mall ecommerce amazon walmart retail
        merchandise item buy purchase
        """
    ),
    "film": _words(
        """
        movie film cinema actor actress director theatre theater showtime netflix tv series
        """
    ),
    "music": _words(
        """
        jazz hear listen rap genre tune music song album artist singer playlist track band concert
        melody guitar piano chord tempo musical instrument spotify
        """
    ),
    "game": _words(
        """
        game gaming player chess poker board zelda nintendo playstation xbox minecraft
        """
    ),
    "sport": _words(
        """
        sport sports team league match football soccer basketball nba nfl mlb tennis golf olympic
        championship tournament cricket baseball player coach roster standings fifa
        """
    ),
    "health": _words(
        """
        health doctor patient medical medicine disease symptom hospital clinic medication
        diagnosis bmi blood heart dose drug therapy illness
        """
    ),
    "fitness": _words(
        """
        workout exercise fitness gym yoga run running steps muscle weight
        """
    ),
    "biology": _words(
        """
        gene dna protein cell species evolution plant animal organism mutation genetic ecology
        biology photosynthesis bacteria
        """
    ),
    "chemistry": _words(
        """
        chemical molecule molecular atom reaction compound acid element boiling melting chemistry
        solution substance
        """
    ),
    "physics": _words(
        """
        velocity acceleration force mass energy gravity magnetic electric electromagnetic physics
        momentum wave kinematics speed field charge voltage current resistance
        """
    ),
    "geometry": _words(
        """
        area volume circle triangle rectangle sphere radius perimeter circumference angle square
        cylinder polygon geometry diameter hypotenuse
        """
    ),
    "algebra": _words(
        """
        equation quadratic polynomial root roots linear solve algebra gcd hcf lcm factor prime
        fibonacci factorial
        """
    ),
    "calculus": _words(
        """
        derivative integral differentiate differentiation integrate integration calculus slope
        gradient
        """
    ),
    "stats": _words(
        """
        probability statistics mean median deviation variance regression correlation distribution
        sample hypothesis binomial
        """
    ),
    "law": _words(
        """
        law legal lawsuit court case attorney lawyer contract crime criminal judge statute patent
        copyright civil
        """
    ),
    "history": _words(
        """
        history historical historic war wars king queen empire century president ancient dynasty
        battle revolution treaty monarch monarchs emperor era leader civilization event
        """
    ),
    "religion": _words(
        """
        religion church bible god religious christian islam buddhist hindu mosque temple
        """
    ),
    "art": _words(
        """
        art painting sculpture museum gallery artwork artist exhibition paint color sketch canvas
        """
    ),
    "place": _words(
        """
        city country state region location address capital population neighborhood place latitude
        longitude coordinates
        """
    ),
    "time": _words(
        """
        time timezone clock hour minute date calendar day hora uhr uhrzeit 时间
        """
    ),
    "schedule": _words(
        """
        schedules remind reminders appointments meetings schedule appointment meeting event
        calendar reminder alarm agenda deadline todo reschedule timer cita rendez-vous termin 日程
        """
    ),
    "mail": _words(
        """
        email mail inbox message sms text chat slack whatsapp notification correo nachricht 邮件
        """
    ),
    "social": _words(
        """
        tweet twitter facebook instagram reddit linkedin youtube post follower hashtag social
        """
    ),
    "news": _words(
        """
        news headline article newspaper journalist noticias nouvelles nachrichten 新闻
        """
    ),
    "book": _words(
        """
        book books author novel library isbn literature
        """
    ),
    "house": _words(
        """
        house home apartment property rent estate realtor room bedroom interior mortgage
        """
    ),
    "device": _words(
        """
        light lights lamp thermostat thermometer tv fan device smart heating oven fridge
        """
    ),
    "file": _words(
        """
        file folder directory document pdf disk archivo fichier datei 文件
        """
    ),
    "shell": _words(
        """
        command terminal shell bash linux process cpu memory disk docker server port
        """
    ),
    "repo": _words(
        """
        git github repository commit branch merge pull issue
        """
    ),
    "web": _words(
        """
        web internet website url page google browse link html scrape
        """
    ),
    "database": _words(
        """
        database sql query table row record mysql postgres mongodb
        """
    ),
    "image": _words(
        """
        image picture photo photograph draw drawing logo thumbnail png jpeg
        """
    ),
    "video": _words(
        """
        video clip stream youtube film
        """
    ),
    "audio": _words(
        """
        audio sound podcast voice speech transcribe transcription
        """
    ),
    "translate": _words(
        """
        translate translation translator language traducir übersetzen traduire 翻译
        """
    ),
    "user": _words(
        """
        user profile username login password account sign register customer
        """
    ),
    "job": _words(
        """
        job career hire recruit resume vacancy employer employee staff salary candidate
        """
    ),
    "school": _words(
        """
        school student teacher university course class exam lecture grade college homework
        """
    ),
    "garden": _words(
        """
        garden plant plants soil flower fertilizer watering lawn tree grow
        """
    ),
    "earth": _words(
        """
        air quality pollution emission carbon ocean earthquake river mountain forest ecosystem
        rainfall
        """
    ),
    "space": _words(
        """
        planet star moon sun galaxy orbit nasa satellite mars astronomy
        """
    ),
    "ticket": _words(
        """
        ticket tickets support issue bug incident complaint jira
        """
    ),
    "order": _words(
        """
        order shipment delivery tracking package refund return cancel pedido commande 订单
        """
    ),
}

#: Kinds of value that tools ask for, by the words of their descriptions ...
SLOT_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "place": _words(
        """
        location city country state region place address destination airport county town
        neighborhood venue origin cities countries locations coordinates
        """
    ),
    "time": _words(
        """
        date year month day period season frame century era dates years days duration hours
        deadline weekly annual daily monthly
        """
    ),
    "amount": _words(
        """
        number amount weight height radius length width mass speed velocity temperature price
        percentage size angle term quantity budget initial base principal dimensions depth
        acceleration force voltage current resistance age salary income probability trials
        """
    ),
    "name": _words(
        """
        name person player artist author company team brand title composer actor song book movie
        user employee product club league character
        """
    ),
    "money": _words(
        """
        currency currencies
        """
    ),
    "unit": _words(
        """
        unit units measurement measurements
        """
    ),
    "text": _words(
        """
        text sentence paragraph message content review string body
        """
    ),
    "id": _words(
        """
        id identifier code isbn uuid username account token
        """
    ),
}

#: ... and words of a request that are such values; the rest is seen by its form (features.py).
VALUE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "time": _words(
        """
        today tonight tomorrow yesterday now current currently latest monday tuesday wednesday
        thursday friday saturday sunday january february march april june july august september
        october november december year years month months week weeks day days weekend century hour
        hours minutes season upcoming recent annual morning evening afternoon noon midnight
        """
    ),
    "amount": _words(
        """
        one two three four five six seven eight nine ten twelve twenty fifty hundred thousand
        million billion half double twice dozen percent
        """
    ),
    "money": _words(
        """
        dollar dollars usd euro euros eur pound pounds gbp yen jpy yuan rmb rupee rupees inr cents
        bucks peso pesos franc francs cad aud
        """
    ),
    "unit": _words(
        """
        kg kilogram kilograms gram grams mg lb lbs pound pounds ounce ounces oz ton tons liter
        liters litre litres ml gallon gallons cup cups teaspoon teaspoons tablespoon tablespoons
        meter meters metre metres cm mm km kilometer kilometers mile miles foot feet inch inches
        yard yards celsius fahrenheit kelvin hz mph kmh watts joules newton volts ohm degrees psi
        acres hectares bytes mb gb seconds
        """
    ),
}
